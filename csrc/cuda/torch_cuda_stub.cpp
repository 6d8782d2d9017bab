// Stands in for torch's libtorch_cuda when the CUDA library is linked, so that every machine, with a CUDA build of
// torch or without, links the same library: one that names libtorch_cuda as the origin of these symbols. The dynamic
// linker then finds them there, although torch keeps them out of the global scope.
extern "C" void aoti_torch_get_current_cuda_stream() {}
