// Calls functions of a library of kernels for another process: run under an emulator, it is how
// tests reach the kernels of another architecture.
//
// All of a request and its answer is little-endian. Request: name; buffers as their sizes, then
// their bytes; integer arguments, each with the number of the buffer it is an offset into, or -1;
// floats. Answer: the result, then the bytes of all buffers.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

static void get(void* to, size_t size) {
    if (fread(to, 1, size, stdin) != size) exit(feof(stdin) ? 0 : 1);
}

template <class T>
static std::vector<T> get_all() {
    uint64_t count;
    get(&count, sizeof count);
    std::vector<T> values(count);
    get(values.data(), count * sizeof(T));
    return values;
}

// Integers and floats go to registers of their own, in order, and what is left of the former to
// places of eight bytes on the stack: so this calls functions with any mixture of them.
using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t, float, float);

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) return fprintf(stderr, "%s\n", dlerror()), 1;
    while (true) {
        const std::vector<char> name = get_all<char>();
        std::vector<void*> buffers;
        const std::vector<uint64_t> sizes = get_all<uint64_t>();
        for (uint64_t size : sizes) buffers.push_back(aligned_alloc(64, (size + 127) / 64 * 64));
        for (size_t i = 0; i < sizes.size(); ++i) get(buffers[i], sizes[i]);
        std::vector<int64_t> a = get_all<int64_t>();
        const std::vector<int64_t> of_buffer = get_all<int64_t>();
        for (size_t i = 0; i < a.size(); ++i)
            if (of_buffer[i] >= 0) a[i] += reinterpret_cast<int64_t>(buffers[of_buffer[i]]);
        std::vector<float> f = get_all<float>();
        a.resize(20);
        f.resize(2);
        auto function = (Function)dlsym(library, std::string(name.begin(), name.end()).c_str());
        if (function == nullptr) return fprintf(stderr, "%s\n", dlerror()), 1;
        const int64_t result =
            function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11],
                     a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19], f[0], f[1]);
        fwrite(&result, 1, sizeof result, stdout);
        for (size_t i = 0; i < sizes.size(); ++i) {
            fwrite(buffers[i], 1, sizes[i], stdout);
            free(buffers[i]);
        }
        fflush(stdout);
    }
}
