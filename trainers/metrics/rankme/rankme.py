"""RankMe, the effective rank of embeddings, as a measurement of the `evaluate` library."""

import datasets
import evaluate
import numpy as np
import torch

from trainers.diagnostics import rankme

_CITATION = """@inproceedings{garrido2023rankme,
  title={RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their Rank},
  author={Garrido, Quentin and Balestriero, Randall and Najman, Laurent and LeCun, Yann},
  booktitle={ICML}, year={2023}
}"""


class RankMe(evaluate.Measurement):
    """`compute(data=embeddings)`, (n, D) numbers, gives `{"rankme": float}`: 1 is collapsed, min(n, D) the most."""

    def _info(self):
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description="RankMe: exp of the entropy of the embeddings' singular values. No labels are needed.",
            citation=_CITATION,
            inputs_description="data (n, D): an embedding an image. Gives rankme, from 1 (collapsed) to min(n, D).",
            features=datasets.Features({"data": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, data):
        return {"rankme": rankme(torch.from_numpy(np.asarray(data, dtype=np.float32)))}
