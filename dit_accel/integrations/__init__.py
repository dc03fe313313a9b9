"""Integrations: the engine behind other programs' doors. Thin; none of them is imported by anything else.

- `bare`: sparse attention for a host that hands over query, key and value, and perhaps where its tokens stand;
- `comfyui`: the nodes of ComfyUI;
- `vllm_omni`: the callable that vLLM-Omni finds by its entry point;
- `comfy_install`: the node pack's way into a ComfyUI folder, and out of it.
"""
