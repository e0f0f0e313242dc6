/* A libnvidia-ml.so.1 whose GPUs draw a power that is known as a function of time, with its exact integral: what a meter is measured against.

   GPU g draws BASE + SWING * sin(2 pi t / PERIOD) + a square wave of STEPS watts (on for the first half of every 3 s). Time is what `fake_time` set last, else the real.
   Personality and faults by environment: FAKE_CHIP=h100|a100|gh200|gh200-flat|gh200-mute, FAKE_OLD=1 (a driver of 2020), FAKE_RESET_S, FAKE_LOST_S, FAKE_FOUND_S,
   FAKE_FORBIDDEN, FAKE_REASONS, FAKE_UPDATE_S: each of GPU 0 only, but for the last two. Numbers and structures are those of NVML's public header. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int Result;
typedef void *Device; /* 1 + index; a MIG instance of GPU g: 101 + g */
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, NO_FUNCTION = 13, LOST = 15 };
enum { GPUS = 8, GPU = 0, MODULE = 1 };
#define BASE 400.0
#define SWING 150.0
#define PERIOD 7.3
#define STEPS 100.0
#define GRACE 90.0 /* what a module draws beside its GPU */

static double stands = 0;
void fake_time(double seconds) { stands = seconds; }
static double clock_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return stands ? stands : t.tv_sec + 1e-9 * t.tv_nsec;
}
#define now clock_now()

static double number(const char *name, double otherwise) { char *text = getenv(name); return text && *text ? atof(text) : otherwise; }
static int is(const char *chip) { char *text = getenv("FAKE_CHIP"); return strcmp(text && *text ? text : "h100", chip) == 0; }
static int grace(void) { char *text = getenv("FAKE_CHIP"); return text && strncmp(text, "gh200", 5) == 0; }

static double watts(int gpu, double t) {
    double beat = fmod(t + gpu, 3.0);
    return BASE + 10 * gpu + SWING * sin(2 * M_PI * t / PERIOD) + (beat < 1.5 ? STEPS : 0);
}
static double upto(int gpu, double t) { /* joules since 0 */
    double u = t + gpu, whole = floor(u / 3.0), beat = u - 3.0 * whole;
    return (BASE + 10 * gpu) * t + SWING * PERIOD / (2 * M_PI) * (1 - cos(2 * M_PI * t / PERIOD)) + STEPS * (1.5 * whole + fmin(beat, 1.5));
}
double fake_joules(int gpu, double from, double to) { return upto(gpu, to) - upto(gpu, from); }
double fake_watts(int gpu, double t) { return watts(gpu, t); }

static double counter_mj(int gpu, int module) {
    double step = number("FAKE_UPDATE_S", 0.1), t = step > 0 ? floor(now / step + 1e-9) * step : now, reset = gpu == 0 ? number("FAKE_RESET_S", 0) : 0;
    double from = reset > 0 && t >= reset ? reset : 0;
    return 1000 * (fake_joules(gpu, from, t) + (module ? GRACE * (t - from) : 0));
}
static double milliwatts(int gpu, int module, double over) {
    double gpus = over > 0 ? fake_joules(gpu, now - over, now) / over : watts(gpu, now);
    return 1000 * (gpus + (module ? GRACE : 0));
}
static Result alive(Device device) {
    if ((long)device % 100 != 1) return SUCCESS;
    double lost = number("FAKE_LOST_S", 0), found = number("FAKE_FOUND_S", 1e18);
    return lost > 0 && now >= lost && now < found ? LOST : SUCCESS;
}
static int index_of(Device device) { return (int)((long)device % 100) - 1; }
#define ALIVE do { Result state = alive(device); if (state) return state; } while (0)
#define PHYSICAL if ((long)device > 100) return NOT_SUPPORTED

Result nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }
Result nvmlInit_v2(void) { return SUCCESS; }
Result nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(Result result) { return result == LOST ? "GPU is lost" : "Unknown"; }

Result nvmlDeviceGetHandleByUUID(const char *uuid, Device *device) {
    int gpu = strlen(uuid) == 40 ? uuid[11] - '0' : -1, instance = gpu < 0 ? 0 : uuid[39] - '0';
    char whole[64];
    snprintf(whole, sizeof whole, "%s-0000000%d-0000-0000-0000-00000000000%d", instance ? "MIG" : "GPU", gpu, instance);
    if (gpu < 0 || gpu >= GPUS || strcmp(whole, uuid)) return NOT_FOUND;
    long first = instance ? 101 : 1;
    if (gpu == 0 && number("FAKE_FORBIDDEN", 0)) return NO_PERMISSION;
    *device = (Device)(first + gpu);
    return alive(*device);
}
Result nvmlDeviceIsMigDeviceHandle(Device device, unsigned *is_mig) { *is_mig = (long)device > 100; return SUCCESS; }
Result nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device mig, Device *device) { *device = (Device)((long)mig - 100); return SUCCESS; }
Result nvmlDeviceGetUUID(Device device, char *text, unsigned size) {
    ALIVE;
    snprintf(text, size, "GPU-0000000%d-0000-0000-0000-000000000000", index_of(device));
    return SUCCESS;
}
Result nvmlDeviceGetName(Device device, char *text, unsigned size) {
    ALIVE;
    snprintf(text, size, grace() ? "NVIDIA GH200 120GB" : is("a100") ? "NVIDIA A100-SXM4-64GB" : "NVIDIA H100 80GB HBM3");
    return SUCCESS;
}
Result nvmlDeviceGetArchitecture(Device device, unsigned *number) { ALIVE; *number = is("a100") ? 7 : 9; return SUCCESS; }
Result nvmlDeviceGetTotalEnergyConsumption(Device device, unsigned long long *millijoules) {
    PHYSICAL;
    ALIVE;
    *millijoules = (unsigned long long)counter_mj(index_of(device), grace());
    return SUCCESS;
}
Result nvmlDeviceGetPowerUsage(Device device, unsigned *mw) {
    PHYSICAL;
    ALIVE;
    *mw = (unsigned)milliwatts(index_of(device), grace(), is("a100") ? 0 : 1.0);
    return SUCCESS;
}
typedef struct { unsigned id, scope; long long stamp, latency; unsigned type; Result result; union { unsigned u; unsigned long long wide; } value; } Field;
Result nvmlDeviceGetFieldValues(Device device, int count, Field *fields) {
    PHYSICAL;
    ALIVE;
    if (number("FAKE_OLD", 0)) return NO_FUNCTION;
    for (int i = 0; i < count; i++) {
        Field *one = fields + i;
        /* "flat": a driver that says the module's whatever the scope; "mute": one that knows no scopes */
        int scoped = grace() && !is("gh200-mute"), module = is("gh200-flat") || one->scope == MODULE || (one->id == 83 && grace());
        one->result = one->scope == GPU || (scoped && one->scope == MODULE) ? SUCCESS : NOT_SUPPORTED;
        one->value.wide = 0xffffffffffffffffull; /* what is not written is not zero */
        if (one->id == 83 || (one->id == 191 && !is("gh200-mute"))) {
            one->type = 3;
            one->value.wide = (unsigned long long)counter_mj(index_of(device), module);
        } else if (one->id == 186 || (one->id == 185 && !is("a100"))) {
            one->type = 1;
            one->value.u = (unsigned)milliwatts(index_of(device), module, one->id == 185 ? 1.0 : 0);
        } else one->result = NOT_SUPPORTED;
    }
    return SUCCESS;
}
static Result reasons(Device device, unsigned long long *bits) { PHYSICAL; ALIVE; *bits = (unsigned long long)number("FAKE_REASONS", 0); return SUCCESS; }
Result nvmlDeviceGetCurrentClocksEventReasons(Device device, unsigned long long *bits) { return number("FAKE_OLD", 0) ? NO_FUNCTION : reasons(device, bits); }
Result nvmlDeviceGetCurrentClocksThrottleReasons(Device device, unsigned long long *bits) { return reasons(device, bits); }
