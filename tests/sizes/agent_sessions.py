import json

from tests.sizes import Sizes

# gaps of a step or two
FEW, MANY, SLOW = "sessions:2/0.1", "sessions:5/0.1", "sessions:5/0.2"
UNEVEN = "lognormal:5/0.1/1"
COMPARED = (
    {"sessions": (MANY, FEW), "fit": (MANY, FEW), "gap": (SLOW, MANY)}
    | {name: (MANY, MANY) for name in ("room", "salt", "blocks", "rank")}
    | {"uneven": (UNEVEN, MANY)}
)
OTHERS = ("tenants", "strangers", "ranked")

SIZES = Sizes(
    fake=f"workloads.agents.loads={json.dumps([FEW, MANY, SLOW], separators=(',', ':'))} "
    + "".join(f'workloads.{name}.loads=["{MANY}"] ' for name in OTHERS)
    + f'workloads.uneven.loads=["{UNEVEN}"] '
    + " ".join(
        f"claims.{name}.{side}.load={load}"
        for name, loads in COMPARED.items()
        for side, load in zip(("treatment", "baseline"), loads, strict=True)
    ),
    cpu="window_s=8",
)
