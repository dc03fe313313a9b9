"""A stand-in for the part of ComfyUI that nodes are written against."""
