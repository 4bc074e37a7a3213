"""The matrix objective: outputs of single linear maps (MaKD's finest level)."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from kdcli.objectives.base import Objective
from kdcli.objectives.hidden import mean_token_mse
from kdcli.signals import Request, Signals


class MatrixObjective(Objective):
    """Mean over pairs of blocks and over `names` of the squared difference of matrix outputs, bias included.

    With `match_norm` every difference is relative to the teacher's mean square. With `local` each of the student's
    matrices gets the teacher's input of the matrix that it follows: mean ||W_S x_T + b_S - (W_T x_T + b_T)||^2, in
    which no matrix depends on another one. Of factors A B without a bias it is least where A B = U_r U_r^T W_T, with
    the leading eigenvectors U_r of W_T E[x_T x_T^T] W_T^T. Source: MaKD's L_mha (query, key, value,
    attention_output) and L_ffn (ffn_in before the activation, ffn_out); the optimum is SVD-LLM's (arXiv 2403.07378).
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        names: Sequence[str],
        *,
        match_norm: bool = True,
        local: bool = False,
    ) -> None:
        super().__init__()
        self.pairs = [((s, name), (t, name)) for s, t in pairs for name in names]
        self.match_norm = match_norm
        self.local = local

    def student_request(self) -> Request:
        if self.local:
            return Request(local=frozenset(self.pairs))
        return Request(matrices=frozenset(s for s, _ in self.pairs))

    def teacher_request(self) -> Request:
        wanted = frozenset(t for _, t in self.pairs)
        return Request(linear=wanted) if self.local else Request(matrices=wanted)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        pairs = self._compared(student, teacher)
        options = {"match_norm": self.match_norm, "by_token": student.uneven}
        return mean_token_mse(pairs, student.mask, student.weights, **options)

    def _compared(self, student: Signals, teacher: Signals) -> Iterator[tuple[Tensor, Tensor]]:
        # One pair at a time: the teacher's may be read from a disk.
        for s, t in self.pairs:
            yield (student.local[s], teacher.linear[t][1]) if self.local else (student.matrices[s], teacher.matrices[t])
