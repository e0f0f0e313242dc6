/* A libnvidia-ml.so.1 whose power limits lie in files, FAKE_DIR/GPU-n, so that every process sees them; two GPUs, GPU-0 and GPU-1.
   FAKE_FORBIDDEN, FAKE_MODULE: of all; FAKE_FAILS=n: GPU-n refuses to be set below 600 W; FAKE_HANGS=k: this process's k-th set never returns, and
   FAKE_DIR/hung says so; FAKE_HANGS_AFTER: it has taken effect. NVML's numbers and structures are those of its public header. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int Result;
typedef void *Device;
typedef struct { unsigned id, scope; long long stamp, latency; unsigned type; Result result; union { unsigned u; unsigned long long wide; } value; } Field;
typedef struct { unsigned version, scope, mw; } Value;
static int sets;

static int number(const char *name) { char *text = getenv(name); return text ? atoi(text) : -1; }
static void path(Device device, char *text) { snprintf(text, 4096, "%s/GPU-%ld", getenv("FAKE_DIR"), (long)device - 1); }
static unsigned limit(Device device) {
    char text[4096];
    unsigned mw = 700000;
    path(device, text);
    FILE *file = fopen(text, "r");
    if (file) { if (fscanf(file, "%u", &mw) != 1) mw = 0; fclose(file); }
    return mw;
}
static void hang(void) {
    char text[4096];
    snprintf(text, sizeof text, "%s/hung", getenv("FAKE_DIR"));
    FILE *file = fopen(text, "w");
    if (file) fclose(file);
    for (;;) pause();
}
static Result set(Device device, unsigned mw) {
    char text[4096], whole[4200];
    sets++;
    if (number("FAKE_FORBIDDEN") == 1) return 4;
    if (mw < 200000 || mw > 700000) return 2;
    if (number("FAKE_FAILS") == (long)device - 1 && mw < 600000) return 999;
    if (number("FAKE_HANGS") == sets && !getenv("FAKE_HANGS_AFTER")) hang();
    path(device, text);
    snprintf(whole, sizeof whole, "%s.%d", text, getpid());
    FILE *file = fopen(whole, "w");
    if (!file) return 999;
    fprintf(file, "%u", mw);
    fclose(file);
    rename(whole, text);
    if (number("FAKE_HANGS") == sets) hang();
    return 0;
}

Result nvmlInit_v2(void) { return 0; }
Result nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(Result result) {
    return result == 4 ? "Insufficient Permissions" : result == 2 ? "Invalid Argument" : result == 6 ? "Not Found" : "Unknown Error";
}
Result nvmlDeviceGetHandleByUUID(const char *uuid, Device *device) {
    if (strcmp(uuid, "GPU-0") && strcmp(uuid, "GPU-1")) return 6;
    *device = (Device)(long)(atoi(uuid + 4) + 1);
    return 0;
}
Result nvmlDeviceGetPowerManagementLimit(Device device, unsigned *mw) { *mw = limit(device); return 0; }
Result nvmlDeviceGetPowerManagementDefaultLimit(Device device, unsigned *mw) { (void)device; *mw = 700000; return 0; }
Result nvmlDeviceGetPowerManagementLimitConstraints(Device device, unsigned *least, unsigned *most) { (void)device; *least = 200000; *most = 700000; return 0; }
Result nvmlDeviceSetPowerManagementLimit(Device device, unsigned mw) { return number("FAKE_MODULE") == 1 ? 3 : set(device, mw); }
Result nvmlDeviceSetPowerManagementLimit_v2(Device device, Value *value) { return value->version == 0x0200000C && value->scope == 1 ? set(device, value->mw) : 2; }
Result nvmlDeviceGetFieldValues(Device device, int count, Field *fields) {
    for (int i = 0; i < count; i++) {
        fields[i].type = 1;
        fields[i].result = number("FAKE_MODULE") == 1 && fields[i].scope == 1 ? 0 : 3;
        fields[i].value.u = fields[i].id == 187 ? 200000 : fields[i].id == 190 ? limit(device) : 700000;
    }
    return 0;
}
