/* A libnvidia-ml.so.1 for machines without a driver: eight healthy GPUs, and faults by environment, FAKE_NAME=GPU:VALUE (GPU may be *).
   Built by tests/preflight/conftest.py; NVML's numbers and structures are those of its public header. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef void *Device;
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, LOST = 15 };

static int count(void) { char *text = getenv("FAKE_GPUS"); return text ? atoi(text) : 8; }

/* The value of this fault on this GPU, else what a healthy one has. */
static long fault(Device device, const char *name, long healthy) {
    char key[64];
    snprintf(key, sizeof key, "FAKE_%s", name);
    char *text = getenv(key), *colon = text ? strchr(text, ':') : NULL;
    if (!colon || (text[0] != '*' && atoi(text) != (int)(long)device - 1)) return healthy;
    return atol(colon + 1);
}

#define ALIVE if (fault(device, "LOST", 0)) return LOST

Result nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }
Result nvmlInit_v2(void) { return SUCCESS; }
Result nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(Result result) {
    return result == LOST ? "GPU is lost" : result == NOT_SUPPORTED ? "Not Supported" : result == INVALID_ARGUMENT ? "Invalid Argument" : "Unknown";
}
Result nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.65.06"); return SUCCESS; }
Result nvmlSystemGetCudaDriverVersion(int *version) { *version = 13000; return SUCCESS; }
Result nvmlDeviceGetCount_v2(unsigned *number) { *number = count(); return SUCCESS; }
Result nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *device) {
    if ((int)index >= count()) return INVALID_ARGUMENT;
    *device = (Device)(long)(index + 1);
    if (fault(*device, "GONE", 0)) return LOST;
    if (fault(*device, "FORBIDDEN", 0)) return NO_PERMISSION;
    return SUCCESS;
}
Result nvmlDeviceGetName(Device device, char *text, unsigned size) {
    ALIVE;
    snprintf(text, size, fault(device, "GRACE", 0) ? "NVIDIA GH200 120GB" : "NVIDIA H100 80GB HBM3");
    return SUCCESS;
}
Result nvmlDeviceGetEccMode(Device device, int *now, int *pending) { ALIVE; *now = *pending = !fault(device, "ECC_OFF", 0); return SUCCESS; }
Result nvmlDeviceGetTotalEccErrors(Device device, int kind, int counter, unsigned long long *errors) {
    ALIVE;
    *errors = kind == 1 ? fault(device, counter == 0 ? "ECC_VOLATILE" : "ECC_AGGREGATE", 0) : 3;
    return SUCCESS;
}
Result nvmlDeviceGetRemappedRows(Device device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    ALIVE;
    *corrected = 0;
    *uncorrected = fault(device, "ROWS", 0);
    *pending = fault(device, "ROW_PENDING", 0);
    *failed = fault(device, "ROW_FAILED", 0);
    return SUCCESS;
}
typedef struct { unsigned id, scope; long long stamp, latency; unsigned type; Result result; union { unsigned u; unsigned long long wide; } value; } Field;
Result nvmlDeviceGetFieldValues(Device device, int number, Field *fields) {
    ALIVE;
    for (int i = 0; i < number; i++) {
        fields[i].type = 1;
        fields[i].result = fields[i].id == 230 ? SUCCESS : NOT_SUPPORTED;
        fields[i].value.u = fault(device, "RECOVERY", 0);
    }
    return SUCCESS;
}
Result nvmlDeviceGetCurrentClocksEventReasons(Device device, unsigned long long *reasons) { ALIVE; *reasons = fault(device, "REASONS", 1); return SUCCESS; }
Result nvmlDeviceGetMaxClockInfo(Device device, int kind, unsigned *mhz) { (void)kind; ALIVE; *mhz = 1980; return SUCCESS; }
Result nvmlDeviceGetApplicationsClock(Device device, int kind, unsigned *mhz) {
    (void)kind;
    ALIVE;
    if (fault(device, "DEPRECATED", 0)) return 26;
    *mhz = fault(device, "CLOCK", 1980);
    return SUCCESS;
}
Result nvmlDeviceGetTemperature(Device device, int kind, unsigned *celsius) { (void)kind; ALIVE; *celsius = fault(device, "CELSIUS", 38); return SUCCESS; }
Result nvmlDeviceGetTemperatureThreshold(Device device, int kind, unsigned *celsius) { (void)kind; ALIVE; *celsius = 90; return SUCCESS; }
Result nvmlDeviceGetPowerManagementLimit(Device device, unsigned *milliwatts) { ALIVE; *milliwatts = 1000 * fault(device, "WATTS", 700); return SUCCESS; }
Result nvmlDeviceGetPowerManagementDefaultLimit(Device device, unsigned *milliwatts) { ALIVE; *milliwatts = 700000; return SUCCESS; }
Result nvmlDeviceGetCurrPcieLinkWidth(Device device, unsigned *lanes) { ALIVE; *lanes = fault(device, "LANES", 16); return SUCCESS; }
Result nvmlDeviceGetMaxPcieLinkWidth(Device device, unsigned *lanes) { ALIVE; *lanes = 16; return SUCCESS; }
Result nvmlDeviceGetCurrPcieLinkGeneration(Device device, unsigned *generation) { ALIVE; *generation = fault(device, "GENERATION", 5); return SUCCESS; }
Result nvmlDeviceGetMaxPcieLinkGeneration(Device device, unsigned *generation) { ALIVE; *generation = 5; return SUCCESS; }
Result nvmlDeviceGetNvLinkState(Device device, unsigned link, int *active) {
    ALIVE;
    if (link >= (unsigned)fault(device, "LINKS", 18)) return INVALID_ARGUMENT;
    *active = fault(device, "LINK_DOWN", -1) != (long)link && !fault(device, "LINKS_DOWN", 0);
    return SUCCESS;
}
Result nvmlDeviceGetNvLinkRemoteDeviceType(Device device, unsigned link, int *kind) {
    (void)link;
    ALIVE;
    if (fault(device, "NO_REMOTE", 0)) return NOT_SUPPORTED;
    *kind = fault(device, "MESH", 0) ? 0 : 2;
    return SUCCESS;
}
Result nvmlDeviceGetNvLinkErrorCounter(Device device, unsigned link, int kind, unsigned long long *errors) {
    ALIVE;
    *errors = link == 5 && kind == 1 ? fault(device, "LINK_RECOVERIES", 0) : 0;
    return SUCCESS;
}
Result nvmlDeviceGetMigMode(Device device, unsigned *now, unsigned *pending) { ALIVE; *now = *pending = fault(device, "MIG", 0); return SUCCESS; }
Result nvmlDeviceGetPersistenceMode(Device device, int *on) { ALIVE; *on = fault(device, "PERSISTENT", 1); return SUCCESS; }
typedef struct { unsigned pid; unsigned long long memory; unsigned instance, compute; } Process;
Result nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned *number, Process *processes) {
    ALIVE;
    long pid = fault(device, "STRANGER", 0);
    unsigned room = *number;
    *number = pid ? 1 : 0;
    if (!pid) return SUCCESS;
    if (room < 1) return 7; /* insufficient size */
    memset(processes, 0, sizeof *processes);
    processes[0].pid = (unsigned)pid;
    return SUCCESS;
}
