"""The sparse FFN in transformers' models: START with install.py.

config.json   keeps the model's own model_type and has one more key, "dsmoe" (options.py)
install.py    every model whose config has the key gets DSMoEFFNs in place of its gated MLPs
remote_code.py  a file beside a saved model, for programs that import nothing by themselves
legacy.py     folders and names of the time when there was a LLaMA of our own
"""

KEY = "dsmoe"
OLD_MODEL_TYPE = "dsmoe_llama"
