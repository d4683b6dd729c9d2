"""Everything far in one cell, expanded about a centre: the sums of a softmax to first order in the query.

Around a centre c the far tokens j weigh exp(c.k_j), and for a query q = c + x

    exp(q.k_j) = exp(c.k_j) exp(x.k_j),  x.k_j = x.K + x.(k_j - K),  K the mean key under the weights exp(c.k_j).

The first part is common to all of them; of the second the exponential is taken to its first order, 1 + x.(k_j - K). So
all of them together have the mass exp(x.K) sum_j exp(c.k_j), and their mean value is V + x.Cov(k, v), with the mean and
the covariance under the same weights: sums over tokens that do not hang on the query. This is the local expansion of
fast multipole methods (Greengard & Rokhlin 1987), with the roles of points taken by queries and keys; to order zero
and about 0 it is the mean key and the mean value of everything far. Every head has a few centres, means of clusters of
its queries, and a query takes the nearest.

The first order fits tokens of little weight, and there are many of them. So a centre can keep some tokens out of its
cell, those with the largest scores at the centre; its queries read them exactly, and every token is still seen once.
Which they are hangs on the centre and the tokens alone: the centre chooses for all queries that are near it, at any
place. This is the clustered attention of Vyas, Katharopoulos & Fleuret (arXiv 2007.04825, "improved") with centres that
are known beforehand, so that it is causal and has a stream, and with sums to first order in place of those of order 0.
"""

from farfield.ops.expansion.api import expansion_state
from farfield.ops.expansion.moments import Moments, evenly_read, moments_of, nearest
from farfield.ops.expansion.sift import sift
from farfield.ops.expansion.stream import Asked, ExpansionStream, with_expansions

__all__ = [
    "Asked",
    "ExpansionStream",
    "Moments",
    "evenly_read",
    "expansion_state",
    "moments_of",
    "nearest",
    "sift",
    "with_expansions",
]
