/* Runs inputs once, without libFuzzer: for other compilers, valgrind, and a look at a finding in a debugger.

   Compiled with the decoder's sources but module.c, fuzz_decode.c, -include watched_buffer.h and -lm. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int count, char **names) {
    for (int i = 1; i < count; i++) {
        FILE *file = fopen(names[i], "rb");
        if (!file || fseek(file, 0, SEEK_END)) {
            perror(names[i]);
            return 1;
        }
        size_t size = (size_t)ftell(file);
        uint8_t *bytes = malloc(size ? size : 1);
        rewind(file);
        if (!bytes || fread(bytes, 1, size, file) != size) {
            perror(names[i]);
            return 1;
        }
        fclose(file);
        LLVMFuzzerTestOneInput(bytes, size);
        free(bytes);
    }
    printf("%d inputs\n", count - 1);
    return 0;
}
