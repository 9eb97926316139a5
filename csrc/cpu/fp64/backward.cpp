#define HEADPRUNE_FP64
#include "../backward.cpp"
