// Dense row passes of the divergences that need no mixture.
#include "distill_dense.h"

namespace effkern {

EFFKERN_DENSE_VARIANT(ForwardKL)
EFFKERN_DENSE_VARIANT(ReverseKL)
EFFKERN_DENSE_VARIANT(SymmetricKL)
EFFKERN_DENSE_VARIANT(DecoupledKL)

}  // namespace effkern
