#define HEADPRUNE_FP64
#include "../delta.cpp"
