"""Adapters as files: PEFT's folders, kohya's and LyCORIS' files, loralib's state dicts; and how a file is replaced.

``safe`` writes to a temporary name, flushes and puts in place; ``tensors`` is a file of tensors or its shards, read
without executing anything; ``bundle`` is an adapter as data; ``peft`` (with ``peft_config``), ``kohya`` and ``loralib``
are one format each. Nothing here holds or changes a model: the manager does.
"""
