// Memory that is kept between calls.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastpref {

// Uninitialised memory for what outlives a call: from 4 MiB on, what an earlier tensor made so has freed.
at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype);

enum class Scratch { kStates, kScaledStates, kLogits, kGradient, kHidden, kWeight, kLeft, kRight, kCount };

// Uninitialised scratch of this thread: first touching memory costs as much as a pass over logits. The next call with
// the same name returns the same memory.
at::Tensor scratch(Scratch name, at::IntArrayRef size, at::ScalarType dtype);

}  // namespace fastpref
