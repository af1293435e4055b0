"""Run as a program: plain PEFT reads the folders of a test, says what the models give, and writes them again."""

import json
import sys
import warnings
from pathlib import Path


def main(root):
    import torch
    from peft import PeftModel

    from files_cases import build, output

    done = {}
    for case in sorted(each for each in Path(root).iterdir() if each.is_dir()):
        name = json.loads((case / "case.json").read_text())["model"]
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                model = PeftModel.from_pretrained(build(name), case / "adapter").eval()
            torch.save(output(model, name), case / "output.pt")
            model.save_pretrained(case / "again")
            done[case.name] = [str(each.message) for each in told if "key" in str(each.message)]
        except Exception as error:
            done[case.name] = [f"{type(error).__name__}: {error}"]
    assert "fastpeft" not in sys.modules
    (Path(root) / "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1])
