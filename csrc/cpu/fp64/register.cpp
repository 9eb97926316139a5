#define HEADPRUNE_FP64
#include "../register.cpp"
