"""Documents of the tasks here that need no network."""

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

# A worked example of lm-eval's MMLU with chains of thought: question, four options, an answer.
EXAMPLE = re.compile(
    r"Q: (.*?)\s*\(A\) (.*?)\s*\(B\) (.*?)\s*\(C\) (.*?)\s*\(D\) (.*?)\s*\nA: .*"
    r"[Tt]he answer is \(?([A-D])\b",
    re.DOTALL,
)
EXAMPLES = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"


def mmlu(**_: Any) -> dict[str, Dataset]:
    """The development questions of MMLU (arXiv 2009.03300, MIT) that lm-eval ships as worked
    examples, without what works them out: 281 with four options."""
    package = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    prompts = json.loads(Path(package, EXAMPLES).read_text())
    rows = []
    for subject, prompt in sorted(prompts.items()):
        for part in re.split(r"\n\n(?=Q: )", prompt):
            if found := EXAMPLE.match(part):
                question, *choices, letter = found.groups()
                row = {"question": question, "choices": choices, "answer": "ABCD".index(letter)}
                rows.append({"subject": subject, **row})
    random.Random(0).shuffle(rows)  # so that --limit takes of all subjects
    return {"test": Dataset.from_list(rows)}


def sums(**_: Any) -> dict[str, Dataset]:
    """Two numbers below 100 each; 200 pairs, and others as examples."""
    draw = random.Random(0)
    pairs = draw.sample([(a, b) for a in range(2, 100) for b in range(2, 100)], 220)
    rows = [{"a": a, "b": b} for a, b in pairs]
    return {"train": Dataset.from_list(rows[200:]), "test": Dataset.from_list(rows[:200])}
