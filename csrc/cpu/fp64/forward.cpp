#define HEADPRUNE_FP64
#include "../forward.cpp"
