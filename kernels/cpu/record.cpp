// Recording, as Python asks for it: see kernels/cpu/recorder.py.
#include "record.h"

#include "api.h"

namespace manta {

thread_local Recording* recording = nullptr;

}  // namespace manta

MANTA_API void manta_start_recording() { manta::recording = new manta::Recording; }

// Of this thread so far: the next call's number.
MANTA_API int64_t manta_num_recorded() { return manta::recording->size(); }

// What this thread has recorded, for `replay` as often as wanted, then for `discard`.
MANTA_API void* manta_stop_recording() {
    manta::Recording* recorded = manta::recording;
    manta::recording = nullptr;
    return recorded;
}

// The calls from `begin` until `end`.
MANTA_API void manta_replay(const void* recorded, int64_t begin, int64_t end) {
    const auto& calls = *static_cast<const manta::Recording*>(recorded);
    for (int64_t i = begin; i < end; ++i) calls[i]();
}

MANTA_API void manta_discard(void* recorded) { delete static_cast<manta::Recording*>(recorded); }
