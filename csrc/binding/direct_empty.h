// What torch::stable::new_empty does, but not as a boxed call of an op that the dispatcher looks up by its name: a
// microsecond, 4 to 18 where other work has emptied the caches, of ops that take some tens and make
// several tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>

#include "binding/checks.h"

namespace dsmoe::binding {

// Of one to three dimensions, the last one contiguous.
struct DenseShape {
  int64_t dims;
  std::array<int64_t, 3> sizes = {}, strides = {};
  DenseShape(std::initializer_list<int64_t> shape) : dims(static_cast<int64_t>(shape.size())) {
    check(dims >= 1 && dims <= 3, "a tensor here has one to three dimensions.");
    std::copy(shape.begin(), shape.end(), sizes.begin());
    int64_t stride = 1;
    for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1))
      strides[d] = stride;
  }
};

// Uninitialized, on the device of `like` and, unless told, of its dtype.
inline Tensor direct_empty(const Tensor& like, const DenseShape& shape,
                           std::optional<ScalarType> dtype = {}) {
  int32_t code = 0, device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  if (dtype) code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.dims, shape.sizes.data(),
                                                  shape.strides.data(), code, device,
                                                  like.get_device_index(), &tensor));
  return Tensor(tensor);
}

}  // namespace dsmoe::binding
