"""Stand-ins for what SGLang 0.5.21 imports and a machine without GPUs lacks; goes on SGLang's PYTHONPATH.

Only SGLang's processes see this folder, and only on CPUs. Nothing in it computes: with the attention backend
`torch_native` no model of the Llama and Qwen families calls a stand-in, and a stand-in that is called raises.
"""
