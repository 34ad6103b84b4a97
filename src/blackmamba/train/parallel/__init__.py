"""One run on many processes (ranks), as torchrun starts them: docs/distributed.md.

config.py what a recipe says; ranks.py who there is; mesh.py who shares what; sharding.py and
experts.py spread the model; shards.py what a rank holds of it; gradients.py brings gradients
together; watch.py names the rank that hangs or died.
"""
