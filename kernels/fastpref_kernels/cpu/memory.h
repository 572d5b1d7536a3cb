// Memory that is kept between calls.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastpref {

// Uninitialised memory for what outlives a call: from 4 MiB on, what an earlier tensor made so has freed.
at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype);

enum class Scratch { kStates, kScaledStates, kLogits, kGradient, kHidden, kWeight, kLeft, kRight, kCount };

// Uninitialised memory of this thread, the same at its next call of that name: first touching memory costs as much as a
// pass over logits. It is another tensor's as soon as that name is asked for again.
at::Tensor scratch(Scratch name, at::IntArrayRef size, at::ScalarType dtype);

}  // namespace fastpref
