"""How much of the routers' drift a prediction explains: from the second moments that records hold per mini-step and MoE layer.

drift.moments says what they are. They add up over rollouts, so that here they are those of a whole run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from megatron_pr2.report.records import RunData, numbered


@dataclass(frozen=True)
class Explained:
    """Frames with a row per mini-step and a column per MoE layer; NaN where nothing drifted or nothing is predicted.

    Attributes:
        r_squared: share of the drift that the whole prediction explains.
        correlation: of predicted and true drift.
        multiple: of the prediction that would fit best, by least squares; 1 is its own size.
        gate_share, hidden_share: of the drift's variance, the gate's own and that of the router's input.
    """

    r_squared: pd.DataFrame
    correlation: pd.DataFrame
    multiple: pd.DataFrame
    gate_share: pd.DataFrame
    hidden_share: pd.DataFrame

    @classmethod
    def of(cls, data: RunData) -> Explained:
        """Of all rollouts of a run."""

        def moment(name: str) -> pd.DataFrame:
            rows = {i: numbered(data.rollouts, f"mini_steps.{i}.per_layer.{name}.#").mean() for i in range(1, data.kappa + 1)}
            return pd.DataFrame(rows).T.astype(float).rename_axis(index="mini-step", columns="MoE layer")

        xx, xd, dd = moment("predicted_squared"), moment("predicted_true"), moment("true_squared")
        gg, gd = moment("gate_squared"), moment("gate_true")
        xx, drifted = xx.where(xx > 0), dd.where(dd > 0)
        return cls(
            r_squared=(2 * xd - xx.fillna(0.0)) / drifted,
            correlation=xd / np.sqrt(xx * drifted),
            multiple=(xd / xx).where(dd > 0),
            gate_share=gg / drifted,
            hidden_share=(dd - 2 * gd + gg) / drifted,
        )

    @property
    def correlation_sums(self) -> pd.Series:
        """By MoE layer, over the mini-steps from the second on; NaN where there is no correlation."""
        return self.correlation.iloc[1:].sum(min_count=1)

    def one_gate(self) -> str:
        """In a sentence, whether one gate for all mini-steps can pay; "" where nothing is known."""
        sums = self.correlation_sums.dropna()
        if sums.empty:
            return ""
        enough, kappa = int((sums > 1).sum()), len(self.correlation)
        steps = "mini-step 2" if kappa == 2 else f"mini-steps 2 to {kappa}"
        said = (
            f"Correlations of predicted and true drift, summed over {steps}: {sums.mean():.2f}, mean of the layers; above 1 in "
            f"{enough} of {len(sums)}. One gate for all mini-steps pays only above 1"
        )
        if kappa == 2:
            return f"{said}, which one mini-step cannot reach: only gates per mini-step (rollout.groups) can gain."
        if not enough:
            return f"{said}: only gates per mini-step (rollout.groups) can gain here."
        return f"{said}, because the first one, where nothing has drifted, pays for the others."
