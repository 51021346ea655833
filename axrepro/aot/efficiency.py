"""How near the parts of a chip come to their published rates.

`python -m benchmarks.step_time_model` fits `product` for each kind of chip, and `attention` and `overlap` for all
together, to published runs of other projects (Google's MaxText: tables of 2023 on v4, v5e and v5p, Llama 3.1 8B and
GPT-3 175B on v6e; addresses in benchmarks/published_runs.py); which, and how the others come out, is in
benchmarks/results/step_time_model.md. `attention` and the `product` of v5p stand at the limits set for them. The other
factors are assumed: 0.85 of the memory's bandwidth and of the links (the scaling book reckons with 0.9), 0.8 of PCIe.
No run on v7x was fitted.
"""

from axrepro.aot.step_time import Efficiency

_PRODUCT = {"v4": 0.799, "v5e": 0.937, "v5p": 0.970, "v6e": 0.806, "v7x": 0.850}

EFFICIENCY = {
    kind: Efficiency(product=product, attention=0.7, memory=0.85, link=0.85, host=0.8, overlap=0.349)
    for kind, product in _PRODUCT.items()
}
