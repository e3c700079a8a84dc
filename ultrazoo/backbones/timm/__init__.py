"""The adapter over timm's vision transformers, `VisionTransformer` and `Eva`."""
