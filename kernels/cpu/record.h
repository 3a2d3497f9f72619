// Calls of kernels, kept as they are made, to be made again without Python between them.
#pragma once

#include <functional>
#include <vector>

namespace manta {

using Recording = std::vector<std::function<void()>>;

extern thread_local Recording* recording;  // of this thread; null while it does not record

// Call the kernel, which owns its arguments, and keep it if this thread records.
template <class Kernel>
inline void run(const Kernel& kernel) {
    if (recording) recording->emplace_back(kernel);
    kernel();
}

}  // namespace manta
