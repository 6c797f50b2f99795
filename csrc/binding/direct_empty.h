// What torch::stable::new_empty does, but not as a boxed call of an op that the dispatcher looks up by its name: a
// microsecond, 4 to 18 where other work has emptied the caches, of ops that take some tens and make
// several tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>

#include "binding/checks.h"

namespace dsmoe::binding {

using DenseShape = std::initializer_list<int64_t>;

inline std::array<int64_t, 2> dense_strides(DenseShape shape) {
  return {shape.size() == 2 ? std::max<int64_t>(shape.begin()[1], 1) : 1, 1};
}

// Uninitialized, of one or two dimensions, on the device of `like` and, unless told, of its dtype.
inline Tensor direct_empty(const Tensor& like, DenseShape shape,
                           std::optional<ScalarType> dtype = {}) {
  check(shape.size() <= 2, "direct_empty makes tensors of one or two dimensions.");
  int32_t code = 0, device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  if (dtype) code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(),
                                                  dense_strides(shape).data(), code, device,
                                                  like.get_device_index(), &tensor));
  return Tensor(tensor);
}

}  // namespace dsmoe::binding
