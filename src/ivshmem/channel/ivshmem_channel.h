/* ivshmem_channel.h: channels in memory that virtual machines and processes share.
 *
 * Layout and protocol, version 1, as inline functions; docs/explanation/channels.md gives the reason
 * for each step. The Python package ivshmem uses these files, so that a program in C and a program
 * in Python can be the two ends of a channel.
 *
 * The files know shared words, places and channels, and what each role stores in which order. They
 * do not know how memory is mapped, how a doorbell is rung, or how a process sleeps: the program
 * supplies those (struct ivshmem_user).
 *
 * Freestanding C11 or C++17: no library, no allocation, no errno, no thread. The machine must be
 * little-endian, and load and store 64 bits at once.
 *
 * A function returns 0 or more, or a value of enum ivshmem_error, which is negative. A struct belongs
 * to one thread at a time. Other peers can write any byte of the memory at any time: each shared word
 * is read once into a local variable, and the variable is checked.
 */
#ifndef IVSHMEM_CHANNEL_H
#define IVSHMEM_CHANNEL_H

#include "ivshmem_channel/bytes.h"
#include "ivshmem_channel/calls.h"
#include "ivshmem_channel/directory.h"
#include "ivshmem_channel/value.h"

#endif
