// csrc/core for Python, element by element over NumPy arrays: the tests try every input.
#include "core/arithmetic.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/nibbles.h"
#include "core/requantize.h"
#include "maps.h"

namespace py = pybind11;

namespace {

using dfq::Grid;

Grid<float> grid(float scale, float zero_point, int64_t quant_min, int64_t quant_max) {
  return dfq::make_grid(scale, zero_point, quant_min, quant_max);
}

float quantize(float x, float scale, float zero_point, int64_t quant_min, int64_t quant_max) {
  return dfq::quantize(x, grid(scale, zero_point, quant_min, quant_max));
}

float fake_quantize(float x, float scale, float zero_point, int64_t quant_min, int64_t quant_max) {
  return dfq::fake_quantize(x, grid(scale, zero_point, quant_min, quant_max));
}

// One of the three members of Gradients.
template <float dfq::Gradients<float>::* Member>
float gradient(float grad, float x, float scale, float zero_point, int64_t quant_min,
               int64_t quant_max) {
  const auto on = grid(scale, zero_point, quant_min, quant_max);
  return dfq::fake_quantize_backward(grad, x, on).*Member;
}

uint32_t philox(uint64_t seed, uint64_t counter, uint64_t counter_high, int word) {
  return dfq::philox(seed, counter, counter_high).word[word & 3];
}

bool dropped(uint32_t word, double drop) { return dfq::dropped(word, dfq::drop_threshold(drop)); }

float rescale(int32_t accumulator, float multiplier, float bias) {
  return dfq::rescale(static_cast<float>(accumulator), multiplier, bias);
}

}  // namespace

PYBIND11_MODULE(_arithmetic, m) {
  using Gradients = dfq::Gradients<float>;
  m.doc() = "The arithmetic of csrc/core, vectorized over NumPy arrays.";
  m.def("round_half_even", py::vectorize(&dfq::round_half_even<float>), py::arg("value"));
  m.def("quantize", py::vectorize(&quantize), py::arg("x"), py::arg("scale"), py::arg("zero_point"),
        py::arg("quant_min"), py::arg("quant_max"), "code - zero_point, as a float");
  m.def("fake_quantize", py::vectorize(&fake_quantize), py::arg("x"), py::arg("scale"),
        py::arg("zero_point"), py::arg("quant_min"), py::arg("quant_max"));
  m.def("gradient_of_x", py::vectorize(&gradient<&Gradients::x>));
  m.def("gradient_of_scale", py::vectorize(&gradient<&Gradients::scale>));
  m.def("gradient_if_clamped", py::vectorize(&gradient<&Gradients::clamped>));
  m.def("philox", py::vectorize(&philox), py::arg("seed"), py::arg("counter"),
        py::arg("counter_high"), py::arg("word"));
  m.def("dropped", py::vectorize(&dropped), py::arg("word"), py::arg("drop"));
  m.def("packed_byte", py::vectorize(&dfq::packed_byte), py::arg("k"));
  m.def("packed_in_upper", py::vectorize(&dfq::packed_in_upper), py::arg("k"));
  m.def("pack_nibbles", py::vectorize(&dfq::pack_nibbles), py::arg("lower"), py::arg("upper"));
  m.def("unpack_nibble", py::vectorize(&dfq::unpack_nibble), py::arg("byte"), py::arg("upper"));
  m.def("rescale", py::vectorize(&rescale), py::arg("accumulator"), py::arg("multiplier"),
        py::arg("bias"));
  m.def("add_residual", py::vectorize(&dfq::add_residual<float>), py::arg("value"),
        py::arg("residual"), py::arg("multiplier"));
  m.def("requantize", py::vectorize(&dfq::requantize), py::arg("value"), py::arg("zero"),
        py::arg("low"), py::arg("high"));
  dfq::define_maps(m);
}
