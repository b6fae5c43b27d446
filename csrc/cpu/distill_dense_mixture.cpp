// Dense row passes of class 3: their weights are summed before the gradient.
#include "distill_dense.h"

namespace effkern {

EFFKERN_DENSE_VARIANT(JSD)
EFFKERN_DENSE_VARIANT(SkewForwardKL)
EFFKERN_DENSE_VARIANT(SkewReverseKL)
EFFKERN_DENSE_VARIANT(TVD)

}  // namespace effkern
