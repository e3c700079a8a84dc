"""The parts that ship, one row each: adding a part means its file and one row here.

`target` is ``module:attribute`` inside ultrazoo, imported on first use. `start` is what `Traits.start` of an attention says
with its minimal options, in a word, for lists that import nothing; a test compares them.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One built-in part."""

    kind: str
    name: str
    target: str
    summary: str
    aliases: tuple[str, ...] = ()
    start: str = ""


def _attention(name: str, target: str, summary: str, start: str, *aliases: str) -> Row:
    return Row("attention", name, f"attention.{target}", summary, aliases, start)


def _part(kind: str, name: str, target: str, summary: str, *aliases: str) -> Row:
    return Row(kind, name, f"attention.parts.{target}", summary, aliases)


TABLE: tuple[Row, ...] = (
    _attention("full", "full:FullSpec", "every token sees every token", "exact", "dense"),
    _attention("original", "original:OriginalSpec", "the host's own attention, untouched", "exact"),
    _attention("by_head", "by_head:ByHeadSpec", "head groups, each with an attention of its own", "as its groups do"),
    _attention("branched", "branched:BranchedSpec", "branches side by side, fused", "needs tuning"),
    _attention("ultragen", "ultragen:UltraGenSpec", "local, regional and global branches", "needs tuning", "UltraGen"),
    _attention("swin", "swin:SwinSpec", "windows that move by half on odd layers", "needs tuning", "video_swin"),
    _attention("axes", "axes:AxesSpec", "along one axis or some (axial, Latte)", "needs tuning", "axial"),
    _attention("t3", "t3:T3Spec", "close and remote windows, averaged (T3-Video)", "needs tuning", "T3"),
    _attention(
        "cross_shaped",
        "cross_shaped:CrossShapedSpec",
        "stripes of rows and of columns (CSWin)",
        "needs tuning",
        "cswin",
    ),
    _attention("linear", "linear:LinearSpec", "one D x D state per head (SANA, SANA-Video)", "needs tuning"),
    _attention(
        "kv_compress", "kv_compress:KvCompressSpec", "keys compressed after projection (PixArt)", "needs tuning"
    ),
    _attention(
        "spatial_reduction",
        "spatial_reduction:SpatialReductionSpec",
        "keys of a reduced map (PVT, Twins)",
        "needs tuning",
    ),
    _attention("monarch", "monarch:MonarchSpec", "a factor along rows, one across them (MonarchRT)", "needs tuning"),
    _attention("delta", "delta:DeltaSpec", "window softmax, delta-rule state beyond it (VDN)", "needs tuning", "vdn"),
    _attention("block_sparse", "block_sparse:BlockSparseSpec", "selected key blocks per query block", "training-free"),
    _attention(
        "neighborhood", "neighborhood:NeighborhoodSpec", "a box of keys per query", "training-free", "GNA", "natten"
    ),
    _attention("sliding_tile", "sliding_tile:SlidingTileSpec", "tiles around each tile", "needs tuning", "STA"),
    _attention("freeswim", "freeswim:FreeswimSpec", "a sliding window of the trained size", "training-free"),
    _attention("atlasvid", "atlasvid:AtlasvidSpec", "windows beside an aligned proxy", "needs tuning"),
    _attention("radial", "radial:RadialSpec", "bands between frames that thin with distance", "training-free"),
    _attention("divided", "divided:DividedSpec", "over time, then inside each frame (TimeSformer)", "needs tuning"),
    _attention("video_sparse", "video_sparse:VideoSparseSpec", "top-k tiles, gated coarse", "needs tuning", "VSA"),
    _attention("nabla", "nabla:NablaSpec", "top-p of blocks and a window of tiles", "training-free"),
    _attention(
        "mixture_of_blocks",
        "mixture_of_blocks:MixtureOfBlocksSpec",
        "blocks for single queries, partition by layer",
        "needs tuning",
        "VMoBA",
        "MoBA",
    ),
    _attention(
        "sparge2", "sparge2:Sparge2Spec", "top-k united with top-p of blocks", "needs tuning", "SpargeAttention2"
    ),
    _attention(
        "sparse_videogen",
        "sparse_videogen:SparseVideoGenSpec",
        "a band per head, in frames or in places",
        "training-free",
        "SVG",
    ),
    _attention(
        "skip_softmax", "skip_softmax:SkipSoftmaxAttentionSpec", "tiles that cannot matter", "training-free", "BLASST"
    ),
    _attention("sol", "sol:SolSpec", "blocks above mean + tau sigma, means of the rest", "training-free", "sol_attn"),
    _attention("subblock", "subblock:SubblockSpec", "top-k blocks by scores of their runs", "training-free"),
    _attention("pisa", "pisa:PisaSpec", "top-k blocks, first-order means of the rest", "training-free"),
    _attention("sparse_linear", "sparse_linear:SparseLinearSpec", "top-k blocks plus linear", "needs tuning", "SLA"),
    _attention("sla2", "sla2:Sla2Spec", "routed blocks, linear for the rest, convex", "needs tuning"),
    _part("layout", "whole", "layouts:WholeSpec", "one group: the whole grid"),
    _part("layout", "windows", "layouts:WindowsSpec", "contiguous windows by count or size"),
    _part("layout", "about", "about:AboutSpec", "windows of about so many tokens, by divisors"),
    _part("layout", "strided", "layouts:StridedSpec", "every n-th token along an axis", "grid", "remote"),
    _part("shift", "none", "shifts:NoShiftSpec", "the same windows in every layer"),
    _part("shift", "roll", "shifts:RollSpec", "odd layers move the window borders (Swin)"),
    _part("shift", "repartition", "shifts:RepartitionSpec", "K windows, K+1 on odd layers (UltraGen)"),
    _part("compress", "avg_pool", "compressors:AvgPoolSpec", "the mean of each cell"),
    _part("compress", "stride", "compressors:StrideSpec", "the first token of each cell", "uniform"),
    _part("compress", "depthwise_conv", "compressors:DepthwiseConvSpec", "a learned mean per channel"),
    _part("fuse", "weights", "fuse:WeightsSpec", "fixed or learned weights; the mean by default", "mean"),
    _part("fuse", "time_gate", "fuse:TimeGateSpec", "gates from the diffusion time (UltraGen)"),
    _part("fuse", "token_gate", "fuse:TokenGateSpec", "gates from each token"),
    _part("fuse", "lse", "fuse:LseSpec", "one softmax over the keys of all branches"),
    _part("selector", "all", "selectors:AllSpec", "every key block"),
    _part("selector", "band", "selectors:BandSpec", "key blocks near the query block in the order"),
    _part("selector", "sink", "selectors:SinkSpec", "key blocks of the first frames"),
    _part("selector", "radial", "radial:RadialMapSpec", "bands between frames, thinner with distance"),
    _part("selector", "sliding", "sliding:SlidingSpec", "a window of tiles (STA)"),
    _part("selector", "frames", "frames:FramesSpec", "key blocks of a window of frames (VDN)"),
    _part("selector", "tokens", "ranges:TokensSpec", "key blocks of a range of tokens"),
    _part("selector", "pooled", "pooled:PooledSpec", "the best scores of block means"),
    _part("selector", "routed", "routed:RoutedSpec", "own blocks and the best, per query or per head (VMoBA)"),
    _part("selector", "union", "selectors:UnionSpec", "what any of several selectors chooses"),
    _part("selector", "budget", "budgets:BudgetSpec", "another share per head or denoising step"),
    _part("selector", "cached", "cached:CachedSpec", "a map kept over denoising steps"),
    _part("far_field", "drop", "far:DropSpec", "unselected keys are left out"),
    _part("far_field", "mean", "far:MeanSpec", "block means in the same softmax"),
    _part("far_field", "coarse", "far:CoarseSpec", "attention among block means, gated"),
    _part("far_field", "linear", "far_linear:LinearFarSpec", "linear attention over all or unselected keys"),
    Row("kernel", "sdpa", "kernels.sdpa:SdpaSpec", "torch scaled_dot_product_attention"),
    Row("kernel", "math", "kernels.math:MathSpec", "plain matmul and softmax in query chunks", ("reference",)),
    Row("kernel", "gathered", "kernels.gathered:GatheredSpec", "block-sparse attention by gathered key blocks"),
    Row("kernel", "by_key", "kernels.by_key:ByKeySpec", "block-sparse attention of single queries, by key block"),
    Row("kernel", "flex", "kernels.flex:FlexSpec", "FlexAttention, compiled for lists of blocks"),
    Row("kernel", "flex_flash", "kernels.flex:FlexFlashSpec", "FlexAttention through its FLASH back end"),
    Row("kernel", "flash_attn", "kernels.flash_attn:FlashAttnSpec", "the flash-attn package", ("fa2",)),
    Row("kernel", "flash_attn_3", "kernels.flash_attn:FlashAttn3Spec", "FlashAttention-3, Hopper", ("fa3",)),
    Row("kernel", "flash_attn_4", "kernels.flash_attn:FlashAttn4Spec", "FlashAttention-4, lists of blocks", ("fa4",)),
    Row("kernel", "skip_softmax", "kernels.skip_softmax:SkipSoftmaxSpec", "skips tiles of small weights"),
    Row("kernel", "xformers", "kernels.xformers:XformersSpec", "xformers memory-efficient attention"),
    Row("backbone", "wan", "backbones.wan:WanSpec", "Wan 2.1 and 2.2 text-to-video transformer"),
    Row("backbone", "diffusers", "backbones.diffusers.spec:DiffusersSpec", "a transformer class of diffusers"),
    Row("backbone", "timm", "backbones.timm.spec:TimmSpec", "a vision transformer of timm"),
    Row("backbone", "dit", "backbones.dit:DitSpec", "class-conditional DiT, image and video", ("DiT",)),
)
