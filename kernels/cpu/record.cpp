// Recording, as Python asks for it: see kernels/cpu/recorder.py.
#include "record.h"

#include "api.h"

namespace manta {

thread_local Recording* recording = nullptr;

}  // namespace manta

MANTA_API void manta_start_recording() { manta::recording = new manta::Recording; }

// What this thread has recorded, for `replay` as often as wanted, then for `discard`.
MANTA_API void* manta_stop_recording() {
    manta::Recording* recorded = manta::recording;
    manta::recording = nullptr;
    return recorded;
}

MANTA_API void manta_replay(const void* recorded) {
    for (const auto& kernel : *static_cast<const manta::Recording*>(recorded)) kernel();
}

MANTA_API void manta_discard(void* recorded) { delete static_cast<manta::Recording*>(recorded); }
