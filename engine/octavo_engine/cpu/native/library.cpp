// The C interface of the library; cpu/library.py declares the same. The only file that is compiled.
//
// Functions that can fail return 0, or -1 for want of memory. Arguments are checked in Python: what comes here is consistent.

#include <exception>
#include <utility>

#include "decoder.h"

using namespace octavo;

#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <class Work>
int32_t guarded(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}

}  // namespace

OCTAVO_EXPORT Decoder* octavo_decoder_new(const Config* config) {
  Decoder* decoder = nullptr;
  guarded([&] { decoder = new Decoder(*config); });
  return decoder;
}

OCTAVO_EXPORT void octavo_decoder_free(Decoder* decoder) { delete decoder; }

OCTAVO_EXPORT int32_t octavo_decoder_set_matrix(Decoder* decoder, int32_t layer, int32_t role, int32_t stored,
                                                int64_t outputs, int64_t inputs, const uint8_t* rows) {
  return guarded([&] { decoder->set_matrix(layer, (Role)role, (Stored)stored, outputs, inputs, rows); });
}

OCTAVO_EXPORT int32_t octavo_decoder_set_vector(Decoder* decoder, int32_t layer, int32_t name, const float* values,
                                                int64_t size) {
  return guarded([&] {
    std::vector<float>& to = (Vector)name == Vector::kFinalNorm ? decoder->final_norm()
                                                                  : decoder->layer(layer).vectors[name];
    to.assign(values, values + size);
  });
}

OCTAVO_EXPORT void octavo_decoder_set_layer(Decoder* decoder, int32_t layer, int32_t window, int32_t rope) {
  decoder->layer(layer).window = window;
  decoder->layer(layer).rope = rope;
}

OCTAVO_EXPORT int32_t octavo_decoder_set_rope(Decoder* decoder, int32_t index, const float* cos, const float* sin) {
  return guarded([&] { decoder->set_rope(index, cos, sin); });
}

OCTAVO_EXPORT int32_t octavo_decoder_forward(Decoder* decoder, const Step* step) {
  return guarded([&] { decoder->forward(*step); });
}

OCTAVO_EXPORT int32_t octavo_decoder_choose(Decoder* decoder, const Choices* choices) {
  return guarded([&] { decoder->choose(*choices); });
}

OCTAVO_EXPORT void octavo_decoder_copy_blocks(Decoder* decoder, const int32_t* pairs, int32_t count) {
  for (int32_t i = 0; i < count; i++) decoder->cache().copy_block(pairs[2 * i], pairs[2 * i + 1]);
}

OCTAVO_EXPORT int64_t octavo_decoder_weight_bytes(const Decoder* decoder) { return decoder->weight_bytes(); }

// Seconds since the start in each phase of decoder.h.
OCTAVO_EXPORT const double* octavo_decoder_phase_seconds(const Decoder* decoder) { return decoder->phase_seconds(); }
