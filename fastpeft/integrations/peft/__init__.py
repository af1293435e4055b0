"""PEFT: ``accelerate`` gives the layers of a PEFT model our operators, in place; ``restore`` takes them out.

Only the class of a layer changes, to one built from the layer's own (`kind`): parameters, buffers, keys, attributes,
saved files, ``isinstance`` and every method stay PEFT's. fastpeft imports neither PEFT nor bitsandbytes: whoever made
the model has imported them. `patch` reaches models that other code makes. Each kind of layer has one file; `kinds`
lists the kinds, and all other code loops over that list.
"""

from fastpeft.integrations.peft.accelerate import accelerate, restore
from fastpeft.integrations.peft.patch import Patch, patch, unpatch
from fastpeft.integrations.peft.report import Report, reason
from fastpeft.integrations.peft.status import Status, status

__all__ = ["Patch", "Report", "Status", "accelerate", "patch", "reason", "restore", "status", "unpatch"]
