/* backend/cuda/activations.cuh - what stands between gate and up, as functions of the GPU. Private, CUDA C++. */
#ifndef OSCAR_CUDA_ACTIVATIONS_CUH
#define OSCAR_CUDA_ACTIVATIONS_CUH

/* x sigmoid(x); for large negative x, x / (1 + inf) is 0; NaN stays in the numerator. */
struct silu {
  __device__ float operator()(float x, float up) const { return x / (1.0f + expf(-x)) * up; }
};
/* As in cpu/ops.c: x / (1 + e^(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3). */
struct gelu {
  __device__ float operator()(float x, float up) const {
    return x / (1.0f + expf(-1.5957691216f * (x + 0.044715f * x * x * x))) * up;
  }
};

#endif
