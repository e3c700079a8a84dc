"""What is done with a whole checkpoint: convert it to another layout, verify it, merge its LoRAs, take them in and out.

Everything is streamed: one tensor at a time from the files that were opened to the files that are written.
"""
