"""PEFT: ``accelerate`` gives the layers of a PEFT model our operators, in place; ``restore`` takes them out.

Only the class of a layer changes, to one built from the layer's own (`kind`): parameters, buffers, keys, attributes,
saved files, ``isinstance`` and every method stay PEFT's. fastpeft imports neither PEFT nor bitsandbytes: a model that
holds their layers has. `patch` reaches the models that others make. One file a kind of layer; `kinds` lists them, and
everything else asks by a loop over the list.
"""

from fastpeft.integrations.peft.accelerate import accelerate, restore
from fastpeft.integrations.peft.patch import Patch, patch, unpatch
from fastpeft.integrations.peft.report import Report, reason
from fastpeft.integrations.peft.status import Status, status

__all__ = ["Patch", "Report", "Status", "accelerate", "patch", "reason", "restore", "status", "unpatch"]
