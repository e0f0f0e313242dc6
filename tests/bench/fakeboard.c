/* A libnvidia-ml.so.1 of two GPUs, GPU-a-FAKE_NAME and GPU-b-FAKE_NAME, with what bench/board.py reads and power/guard.py sets. Power limits lie in files,
   FAKE_DIR/0 and FAKE_DIR/1, so that every process sees them. NVML's numbers and structures are those of its public header. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef void *Device;
typedef struct { unsigned long long total, free, used; } Memory;

static void path(Device device, char *text) { snprintf(text, 4096, "%s/%ld", getenv("FAKE_DIR"), (long)device - 1); }
static void name(long gpu, char *text, unsigned room) { snprintf(text, room, "GPU-%c-%s", (char)('a' + gpu), getenv("FAKE_NAME")); }

Result nvmlInit_v2(void) { return 0; }
Result nvmlInitWithFlags(unsigned flags) { (void)flags; return 0; }
Result nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(Result code) { return code == 4 ? "Insufficient Permissions" : code == 3 ? "Not Supported" : "Unknown Error"; }
Result nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
Result nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *device) { if (index > 1) return 2; *device = (Device)(long)(index + 1); return 0; }
Result nvmlDeviceGetHandleByUUID(const char *uuid, Device *device) {
    char text[256];
    for (long gpu = 0; gpu < 2; gpu++) {
        name(gpu, text, sizeof text);
        if (!strcmp(text, uuid)) { *device = (Device)(gpu + 1); return 0; }
    }
    return 6;
}
Result nvmlDeviceGetUUID(Device device, char *text, unsigned room) { name((long)device - 1, text, room); return 0; }
Result nvmlDeviceGetName(Device device, char *text, unsigned room) { (void)device; snprintf(text, room, "Fake H100"); return 0; }
Result nvmlDeviceGetPowerManagementLimit(Device device, unsigned *mw) {
    char text[4096];
    path(device, text);
    *mw = 650000;
    FILE *file = fopen(text, "r");
    if (file) { if (fscanf(file, "%u", mw) != 1) *mw = 0; fclose(file); }
    return 0;
}
Result nvmlDeviceGetEnforcedPowerLimit(Device device, unsigned *mw) { return nvmlDeviceGetPowerManagementLimit(device, mw); }
Result nvmlDeviceGetPowerManagementDefaultLimit(Device device, unsigned *mw) { (void)device; *mw = 700000; return 0; }
Result nvmlDeviceGetPowerManagementLimitConstraints(Device device, unsigned *least, unsigned *most) {
    (void)device; *least = 200000; *most = 700000; return 0;
}
Result nvmlDeviceSetPowerManagementLimit(Device device, unsigned mw) {
    char text[4096];
    if (getenv("FAKE_FORBIDDEN")) return 4;
    if (mw < 200000 || mw > 700000) return 2;
    path(device, text);
    FILE *file = fopen(text, "w");
    if (!file) return 999;
    fprintf(file, "%u\n", mw);
    fclose(file);
    return 0;
}
Result nvmlDeviceGetFieldValues(Device device, int count, void *values) { (void)device; (void)count; (void)values; return 3; }
Result nvmlDeviceGetClockInfo(Device device, unsigned kind, unsigned *mhz) { *mhz = kind == 1 ? 1700 + 100 * (unsigned)(long)device : 2600; return 0; }
Result nvmlDeviceGetTemperature(Device device, unsigned kind, unsigned *celsius) { (void)kind; *celsius = 50 + (unsigned)(long)device; return 0; }
Result nvmlDeviceGetMemoryInfo(Device device, Memory *memory) {
    memory->total = 80ull << 30; memory->used = (unsigned long long)(long)device << 30; memory->free = memory->total - memory->used; return 0;
}
