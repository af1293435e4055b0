"""Adapters as files: PEFT's folders, kohya's and LyCORIS' files, loralib's state dicts; and how one is replaced.

``safe`` writes aside, flushes and puts in place; ``tensors`` is one file of tensors or its shards, read without
executing anything; ``bundle`` is an adapter as data; ``peft`` (with ``peft_config``), ``kohya`` and ``loralib`` are one
format each. Nothing here holds a model or changes one: that is the manager's.
"""
