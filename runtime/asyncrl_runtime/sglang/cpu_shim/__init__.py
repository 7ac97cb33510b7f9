"""What SGLang 0.5.21 wants at import and a machine without GPU lacks. This folder goes on its PYTHONPATH.

Only SGLang's processes see it, and only on CPUs. Nothing here computes: with the `torch_native` attention no
model of the Llama and Qwen families calls what is stood in for, and a call that does come raises.
"""
