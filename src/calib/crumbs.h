/* calib/crumbs.h - sharing a row's crumbs out among channels. Private. */
#ifndef OSCAR_CALIB_CRUMBS_H
#define OSCAR_CALIB_CRUMBS_H

#include "quant/codec.h"

enum { MOST_CRUMBS = OSCAR_MAX_CRUMBS_PER_CHANNEL };

/* Gives `crumbs` to channels of descending variance: the next always where it saves most. Each gets at least `least`. */
void crumbs_allocate(int channels, const double *variance, int crumbs, int least, uint8_t *n);

/* order[k]: the channel at place k, so that none lies across a border of the groups (oscar/codec.h). Where there is no such order
 * crumbs move between channels: first what narrows the differences, then the other way, one more pair of channels each time
 * (channels of three crumbs alone do not fill 16). UNSUPPORTED if that does not help either. */
oscar_status crumbs_arrange(oscar_context *context, int channels, uint8_t *n, int crumbs, int groups, int *order);

#endif
