#define HEADPRUNE_FP64
#include "../gradients.cpp"
