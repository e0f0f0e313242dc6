"""What a run draws by how much of the time steps run: a straight line, learnt from what was measured, with how sure that is. Pure arithmetic."""

import math
from dataclasses import dataclass

MEAN_S = 10.0  # a budget is kept over means of so long; the same is the least that is learnt from
SURE = 2.0  # standard deviations of what is not known of the model
LOW = 0.05  # of full speed: the least that a run is slowed to before it is paused
SETTLE_S = 2.0  # of a meter's mean: earlier by so much before a drop


@dataclass
class Line:
    """watts = rest + swing x duty, and how sure that is."""

    rest: float
    swing: float
    var_rest: float
    var_swing: float
    both: float  # their covariance
    noise: float  # variance of a mean over MEAN_S
    looks: int = 0
    duty_before: float | None = None

    @classmethod
    def prior(cls, full: float) -> "Line":
        """From what the run is expected to draw, which is a figure of alike machines: rest about 45 % of it, the sum within 25 %."""
        return cls(0.45 * full, 0.55 * full, (0.2 * full) ** 2, (0.32 * full) ** 2, -0.04 * full**2, (0.01 * full) ** 2)

    @classmethod
    def first(cls, watts: float, duty: float, seconds: float) -> "Line":
        """From one look only: rest is between a quarter and two thirds of full power, as of all machines that were metered, and the look fits."""
        duty = max(duty, LOW / 2)

        def of(share: float) -> float:
            return share * watts / (share + (1 - share) * duty)

        rest = of(0.45)
        off = max(0.02 * watts, (of(0.65) - of(0.25)) / 2)
        swing = max(0.01 * watts, (watts - rest) / duty)
        late = SETTLE_S * swing * duty / seconds  # it began at rest, and draw and meter followed
        return cls(rest, swing, off**2 + late**2, 1.02 * (off / duty) ** 2, -(off**2) / duty, (0.01 * watts) ** 2, duty_before=duty)

    def at(self, duty: float) -> float:
        return self.rest + self.swing * duty

    def unsure(self, duty: float) -> float:
        return math.sqrt(max(0.0, self.var_rest + 2 * duty * self.both + duty * duty * self.var_swing))

    def learn(self, watts: float, duty: float, seconds: float) -> None:
        scale = (watts * 1e-3) ** 2 * seconds / MEAN_S  # what may have changed since
        self.var_rest = min(self.var_rest + scale, (0.3 * watts) ** 2)
        self.var_swing = min(self.var_swing + 9 * scale, (watts / max(duty, LOW)) ** 2)
        self._sound(watts)
        off, spread = watts - self.at(duty), self.unsure(duty) ** 2
        # Draw and meter follow a change of duty within SETTLE_S: that much of the time may belong to what was before.
        late = (SETTLE_S * self.swing * (duty - (duty if self.duty_before is None else self.duty_before)) / seconds) ** 2
        noise, self.duty_before = self.noise * MEAN_S / seconds, duty
        if off * off > 9 * (spread + late + noise):  # what no noise explains is a change, and believed as one
            self.var_swing += off * off / max(duty, 0.3) ** 2
        else:  # of what is off, noise's share is noise's
            part = noise / (spread + late + noise)
            self.looks += 1
            self.noise += max(0.1, 1 / (self.looks + 2)) * part * (off * off * part * seconds / MEAN_S - self.noise)
        self.noise = max(self.noise, (watts * 2e-3) ** 2)
        gain = self.var_rest + duty * self.both, self.both + duty * self.var_swing
        total = gain[0] + duty * gain[1] + noise + late
        self.rest += gain[0] / total * off
        self.swing += gain[1] / total * off
        self.var_rest -= gain[0] * gain[0] / total
        self.both -= gain[0] * gain[1] / total
        self.var_swing -= gain[1] * gain[1] / total
        self.rest = max(0.0, self.rest)
        self.swing = max(0.15 * self.rest, self.swing)  # no machine that trains draws less for it
        self._sound(watts)

    def _sound(self, watts: float) -> None:
        """Keep the covariance one, whatever was cut or rounded off."""
        self.var_rest, self.var_swing = max(self.var_rest, (1e-4 * watts) ** 2), max(self.var_swing, (1e-4 * watts) ** 2)
        most = 0.999 * math.sqrt(self.var_rest * self.var_swing)
        self.both = max(-most, min(most, self.both))

    def duty(self, watts: float, more: float, sure: float = SURE) -> float:
        """The most duty that stays under so many watts, with what is unsure and `more` on top; below 0 if none does."""
        low, high = -0.5, 1.5
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle) + sure * self.unsure(max(0.0, middle)) + more <= watts else (low, middle)
        return low
