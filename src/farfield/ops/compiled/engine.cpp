// The compiled engine, one unit: each of these parts has its Python side beside it under the same name.

#include "choice.h"
#include "expansion.h"
#include "heads.h"
#include "pyramid.h"
#include "tiles.h"

// So that a caller can see that it speaks of the same structures.
extern "C" int64_t farfield_size(int64_t of) {
  const int64_t sizes[] = {sizeof(Store), sizeof(Call), sizeof(Reduction), sizeof(Rung), sizeof(Descent), sizeof(Step),
                           sizeof(Expansion), sizeof(Advance), sizeof(ExpansionStep)};
  return sizes[of];
}
