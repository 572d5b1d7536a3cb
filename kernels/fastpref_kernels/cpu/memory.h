// Memory that is kept between calls.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastpref {

// Return uninitialised memory for a result. From 4 MiB on, it reuses the memory of results that were freed.
at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype);

enum class Scratch { kStates, kScaledStates, kLogits, kGradient, kHidden, kWeight, kLeft, kRight, kCount };

// Return uninitialised scratch of this thread. The next call with the same name returns the same memory, because
// touching new memory costs as much as a pass over logits.
at::Tensor scratch(Scratch name, at::IntArrayRef size, at::ScalarType dtype);

}  // namespace fastpref
