import json

from tests.sizes import Sizes

# gaps of a step or two
FEW, MANY, SLOW = "sessions:2/0.1", "sessions:5/0.1", "sessions:5/0.2"
COMPARED = {"room": (MANY, MANY), "sessions": (MANY, FEW), "fit": (MANY, FEW), "gap": (SLOW, MANY)}

SIZES = Sizes(
    fake=f"workloads.agents.loads={json.dumps([FEW, MANY, SLOW], separators=(',', ':'))} "
    + " ".join(
        f"claims.{name}.{side}.load={load}"
        for name, loads in COMPARED.items()
        for side, load in zip(("treatment", "baseline"), loads, strict=True)
    ),
    cpu="window_s=8",
)
