"""A binary arithmetic coder (Witten, Neal & Cleary 1987), and what a receiver does with the laws of description lengths, decision by decision."""

import torch
import torch.nn.functional as F

from switch_sae.analysis.codes.exact_k import log_elementary
from switch_sae.analysis.codes.values import Values

TOP, HALF, QUARTER = 2**32, 2**31, 2**30


class Sender:
    """Writes decisions as bits."""

    def __init__(self):
        self.low, self.high, self.pending, self.written = 0, TOP - 1, 0, []

    def decide(self, chance, happens):
        split = _split(self.low, self.high, chance)
        self.low, self.high = (self.low, split) if happens else (split + 1, self.high)
        while True:
            if self.high < HALF:
                self._write(0)
            elif self.low >= HALF:
                self._write(1)
                self.low, self.high = self.low - HALF, self.high - HALF
            elif self.low >= QUARTER and self.high < 3 * QUARTER:
                self.pending += 1
                self.low, self.high = self.low - QUARTER, self.high - QUARTER
            else:
                return happens
            self.low, self.high = 2 * self.low, 2 * self.high + 1

    def _write(self, bit):
        self.written += [bit] + [1 - bit] * self.pending
        self.pending = 0

    def message(self):
        self.pending += 1
        self._write(int(self.low >= QUARTER))
        return self.written


class Receiver:
    """Reads the same decisions out of them."""

    def __init__(self, message):
        self.message, self.place, self.low, self.high, self.code = message, 0, 0, TOP - 1, 0
        for _ in range(32):
            self.code = 2 * self.code + self._next()

    def _next(self):
        self.place += 1
        return self.message[self.place - 1] if self.place <= len(self.message) else 0

    def decide(self, chance, happens=None):
        split = _split(self.low, self.high, chance)
        happens = self.code <= split
        self.low, self.high = (self.low, split) if happens else (split + 1, self.high)
        while self.high < HALF or self.low >= HALF or (self.low >= QUARTER and self.high < 3 * QUARTER):
            down = 0 if self.high < HALF else HALF if self.low >= HALF else QUARTER
            self.low, self.high, self.code = 2 * (self.low - down), 2 * (self.high - down) + 1, 2 * (self.code - down) + self._next()
        return happens


def _split(low, high, chance):
    return min(max(low + int((high - low + 1) * float(chance)) - 1, low), high - 1)


def one_of(coder, chances, wanted=None):
    """A number with these probabilities, as decisions whether it is 0, else 1, ..."""
    left = sum(chances)
    for number, chance in enumerate(chances[:-1]):
        if coder.decide(chance / left, None if wanted is None else wanted == number):
            return number
        left -= chance
    return len(chances) - 1


class SupportLine:
    """Sends or receives supports of one `SupportLaw`, token by token."""

    def __init__(self, law, num_groups):
        self.law, self.num_groups, self.most = law, num_groups, law.log_number_CJ.shape[1] - 1
        size = law.log_odds_CL.shape[1]
        self.tails = [log_elementary(law.log_odds_CL[:, i:], self.most) if i < size else None for i in range(size)]
        self.after_C = None

    def transmit(self, coder, first, wanted=None):
        """`wanted` is (group, latents) for a sender; what was received is returned."""
        law, size = self.law, self.law.log_odds_CL.shape[1]
        looks_back = law.log_step_CC is not None and not first
        chance_C = self.after_C @ law.log_step_CC.exp() if looks_back else law.log_share_C.exp()
        chance_C = chance_C / chance_C.sum()
        per_G = [float(chance_C[law.group_C == group].sum()) for group in range(self.num_groups)]
        group = one_of(coder, per_G, None if wanted is None else wanted[0])
        chance_C = chance_C.masked_fill(law.group_C != group, 0.0)
        number_J = (chance_C[:, None] * law.log_number_CJ.exp()).sum(0)
        left = one_of(coder, number_J.tolist(), None if wanted is None else len(wanted[1]))
        chance_C = chance_C * law.log_number_CJ[:, left].exp()
        active = []
        for latent in range(size):
            if left == 0:
                break
            rest_C = self.tails[latent + 1][:, left - 1] if latent + 1 < size else torch.zeros(len(chance_C))
            is_in_C = (law.log_odds_CL[:, latent] + rest_C - self.tails[latent][:, left]).exp().clamp(max=1)
            happens = coder.decide((chance_C * is_in_C).sum() / chance_C.sum(), None if wanted is None else latent in wanted[1])
            chance_C = chance_C * (is_in_C if happens else 1 - is_in_C)
            chance_C = chance_C / chance_C.sum()
            if happens:
                active.append(latent)
                left -= 1
        self.after_C = chance_C / chance_C.sum()
        return group, active


def transmit_levels(coder, law, latents, num_latents, wanted=None):
    """The levels of active latents in order: the law of each from what was read before it."""
    read, levels = torch.zeros(1, len(latents)), []
    latent_TK = torch.tensor([latents])
    ones = torch.ones(1, len(latents))
    for slot in range(len(latents)):
        so_far = Values(read, latent_TK, ones, ones > 1, num_latents)
        bin_1 = law.bins(so_far)[0, slot : slot + 1]
        left, level = 1.0, 0
        while True:
            chance = float(law.levels.probability(torch.tensor([level]), bin_1))
            if coder.decide(chance / left, None if wanted is None else wanted[slot] == level):
                break
            left, level = left - chance, level + 1
        levels.append(level)
        read = F.pad(read[:, :slot], (0, len(latents) - slot))
        read[0, slot] = (level + 0.5) * law.quantizer.step
    return levels
