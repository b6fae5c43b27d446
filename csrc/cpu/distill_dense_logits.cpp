// Dense row passes of the losses on the logits themselves.
#include "distill_dense.h"

namespace effkern {

EFFKERN_DENSE_VARIANT(MSE)
EFFKERN_DENSE_VARIANT(CenteredMSE)
EFFKERN_DENSE_VARIANT(ZScoredMSE)
EFFKERN_DENSE_VARIANT(Cosine)

}  // namespace effkern
