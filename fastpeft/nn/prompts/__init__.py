"""Prompts and prefixes: virtual tokens that are trained instead of the model.

``virtual`` is their common base; ``prompt_embedding``, ``p_tuning`` and ``prefix`` are the encoders; ``prepend`` makes
the masks, labels and positions of a longer sequence; ``insertion`` puts them into a transformers model, in which
``hosts``, ``prompt_host`` and ``prefix_host`` let them act, and ``checkpointing`` a prefix under recomputation;
``classical`` has the baselines that train neither. Plain torch: an encoder runs once a step on P rows, and a kernel
would gain nothing. Nothing that adapts a weight belongs here.
"""

from fastpeft.nn.prompts.classical import PatternVerbalizer, freeze_body
from fastpeft.nn.prompts.insertion import insert_prefix, insert_prompt, remove_prompt
from fastpeft.nn.prompts.p_tuning import PromptEncoder, PTuningEmbedding
from fastpeft.nn.prompts.prefix import Prefix, PrefixEncoder, PrefixTuning
from fastpeft.nn.prompts.prepend import Prepended, prepend_prompt
from fastpeft.nn.prompts.prompt_embedding import PromptEmbedding
from fastpeft.nn.prompts.virtual import Prompt, VirtualTokens

__all__ = [
    "PTuningEmbedding",
    "PatternVerbalizer",
    "Prefix",
    "PrefixEncoder",
    "PrefixTuning",
    "Prepended",
    "Prompt",
    "PromptEmbedding",
    "PromptEncoder",
    "VirtualTokens",
    "freeze_body",
    "insert_prefix",
    "insert_prompt",
    "prepend_prompt",
    "remove_prompt",
]
