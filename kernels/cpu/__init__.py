"""CPU kernels: one extension per source, ISA level and dtype, e.g. `recurrent_avx512_f32`."""
